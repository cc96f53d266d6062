"""What a runtime's configuration may say, and how a file that says it becomes checked values."""
