"""How a batch is run. Every engine gives the same answers; none of them knows the model class."""
