"""A trained model at work, and the way from and to Hugging Face's formats. The core never imports this room."""
