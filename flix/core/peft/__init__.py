"""LoRAs of PEFT, in and out, and what vLLM serves."""
