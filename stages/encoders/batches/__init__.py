"""From captions to batches: token ids, batches of similar lengths, smaller ones when memory is short."""
