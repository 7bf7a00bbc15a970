"""Which way of decoding is the fastest on the machine at hand: a replay of traced texts at measured costs."""
