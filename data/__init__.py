"""Everything about text: records, converters, the tokenizer, the toy world and its labelers."""
