"""Training, evaluation and the folders that runs leave behind."""
