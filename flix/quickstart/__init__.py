"""Parts of ``flix quickstart``: its data, its byte tokeniser and its small pretrained base."""
