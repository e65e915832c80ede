// Tests live beside this file, named for what they test.
