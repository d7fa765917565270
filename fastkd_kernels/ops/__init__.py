"""One file per op: formula, reference, kernel, configuration, registration, autograd, public function."""
