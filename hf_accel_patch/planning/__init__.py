"""What a model takes in memory: estimated from its configuration, compared with the machine, fitted to a budget."""
