"""From the trained graph to integers, and out to the formats of other programs."""
