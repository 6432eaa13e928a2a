"""What several test folders share: models, repairs of the Triton interpreter, compile cases."""
