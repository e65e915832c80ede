import ArgumentParser

/// The command-line program.
struct MooncakeCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "mooncake",
    abstract: "Moves memory between processes and machines.",
    version: programVersion,
    subcommands: [
      BenchCommand.self, DoctorCommand.self, MetadataCommand.self, StoreCommand.self,
    ])
}

/// Groups the two sides of a measurement.
struct BenchCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "bench",
    abstract: "Measures transfers between two processes.",
    discussion: """
      Start `mooncake bench target` on one side. It prints the name of its segment, which \
      `mooncake bench initiator --segment NAME` reads and writes on the other side.
      """,
    subcommands: [BenchTargetCommand.self, BenchInitiatorCommand.self])
}
