"""What flix changes in torch and in users' models; each file says what, when, and how it is undone."""
