// Who imports the engine gets the errors, addresses and metadata services of its interface, too.
@_exported import MooncakeBase
@_exported import MooncakeMetadata
