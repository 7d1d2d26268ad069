"""The one door for writing predictions. Every file appears whole or not at all."""
