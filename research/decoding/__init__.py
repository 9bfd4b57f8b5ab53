"""From a trained model to text: sampling and the jitted decode loop."""
