"""Export of trained models to llama.cpp, Ollama and vLLM."""
