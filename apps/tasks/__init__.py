"""What is trained for: each task is a LightningModule around an ordinary backbone."""
