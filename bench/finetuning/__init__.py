"""Fine-tuning the models of the pretraining experiments on classification tasks."""
