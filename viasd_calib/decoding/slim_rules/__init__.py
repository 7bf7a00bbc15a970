"""Rules of the slim tier, one module each; a spec's ``gates.convention`` names the module."""
