"""What decoding waits for: forwards of models and values read from the device, alone or for a batch of texts."""
