"""The optimizer: a chain and parameters become a plan, and the plan steps one parameter at a time."""
