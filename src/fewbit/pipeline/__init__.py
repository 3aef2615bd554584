"""The calibration pass: scheduler, Hessians, layer quantizer, weights, activations, journal."""
