"""Fine-tuning on labelled text, predictions and embeddings: ``hbert finetune | predict | embed``."""
