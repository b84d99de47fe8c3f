"""What a pretrained encoder is worth: protocols, fine-tuning, scores and tables, inference."""
