"""Learning from traces: the route with its adapter, and the shallow drafter."""
