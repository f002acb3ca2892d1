"""Handing a trained model to other programs: llama.cpp, Ollama, vLLM."""
