"""Export: a trained graph becomes integers, written as a .twta file or in the formats of other programs."""
