"""Chat with runs and models in the browser, and compare them blindly."""
