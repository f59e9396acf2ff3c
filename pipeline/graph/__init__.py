"""The channel graph of a model: coupled groups, plans, surgery, masks."""
