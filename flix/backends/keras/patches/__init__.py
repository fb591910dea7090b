"""What flix changes in Keras and in a user's objects. Each file says what, when, and how it is undone."""
