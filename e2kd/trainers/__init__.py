"""One file for each host: timm, Accelerate, Hugging Face's Trainer. Each loads its host when it is imported."""
