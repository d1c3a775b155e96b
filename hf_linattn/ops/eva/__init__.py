"""EVA: windows and chunks, published and exclusive, relative positions."""
