"""Tests of peftchat; they mirror its rooms."""
