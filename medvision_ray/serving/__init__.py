"""Single images over HTTP: the same model, decoders and rows as the batch job."""
