"""The attention hook, the heads it reaches, and what can be measured or changed there."""
