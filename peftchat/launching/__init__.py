"""Jobs for clusters: files for Slurm, Kubernetes and SkyPilot, written from a recipe and its plan. Nothing is sent."""
