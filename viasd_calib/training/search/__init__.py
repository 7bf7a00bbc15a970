"""Ways of choosing a route without training, on the same texts and the same budget of passes."""
