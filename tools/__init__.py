"""What makes parts of the repository and is not shipped."""
