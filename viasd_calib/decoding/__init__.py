"""The three-tier decoder and its baselines; nothing here needs the training half of the package."""
