"""Which data comes when: schedules, packing and batching, as arithmetic."""
