"""The algebra of one attention call: which keys are local, bulk and padding, what goes in and what comes out."""
