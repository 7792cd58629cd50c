"""Around the models: files and pictures, mosaics of textures, weights with their options, timing."""
