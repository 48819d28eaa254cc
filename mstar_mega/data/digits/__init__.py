"""The built-in task: questions about pictures of several handwritten digits."""
