import ArgumentParser
import MooncakeBase
import MooncakeEngine
import MooncakeP2P
import MooncakeSystem

/// Groups the commands for the P2P store.
struct StoreCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "store",
    abstract: "Publishes files under a name, and fetches them wherever they are needed.",
    discussion: """
      Every receiver offers what has arrived to the others, so that many receivers take about the \
      time of one. Exit codes: 0 done, 1 failed, 3 no such payload, 4 bytes or sizes differ from \
      those published, 64 wrong usage, 130 interrupted.
      """,
    subcommands: [
      StorePublishCommand.self, StoreGetCommand.self, StoreServeCommand.self,
      StoreListCommand.self, StoreStatCommand.self, StoreWatchCommand.self,
      StoreRemoveCommand.self,
    ])
}

/// The store's metadata service and this process's engine; shared by all store commands.
struct StoreArguments: ParsableArguments {
  @OptionGroup var service: ServiceArguments

  @Flag(help: "Prints JSON, one object a line.")
  var json = false

  @Option(help: "Name of this process's segment; default: its address.")
  var segment: String?

  @OptionGroup var listening: ListenArguments

  @Option(help: "How long the operation may take, such as 30, 500ms or 10m.")
  var timeout: TimeSpan?

  func validate() throws {
    if let timeout, timeout.nanoseconds < 1_000_000 {
      throw ValidationError("--timeout must be at least 1ms.")
    }
  }

  /// Limits of one operation; a signal cancels it.
  func operation(_ stop: StopRequest, _ progress: ProgressDisplay? = nil) -> StoreOperation {
    var operation = StoreOperation(timeoutMilliseconds: timeout?.milliseconds ?? 0)
    operation.cancellation = stop.cancellation
    if let progress {
      operation.progress = { state in
        progress.show(state)
        return true
      }
    }
    return operation
  }

  /// Runs `body` with a store and turns failures into messages and exit codes.
  func withStore(_ stop: StopRequest, _ body: (P2PStore) throws -> Void) throws {
    do {
      var options = TransferEngine.Options()
      options.metadataURI = service.uri
      options.name = segment
      listening.set(&options)
      let store = try P2PStore(engineOptions: options)
      defer { store.close() }
      try body(store)
    } catch let error as MooncakeError {
      printError("mooncake: \(error.message)")
      throw ExitCode(Self.exitCode(error, stop))
    }
  }

  private static func exitCode(_ error: MooncakeError, _ stop: StopRequest) -> Int32 {
    // After a signal, any other failure is a consequence of it.
    if stop.isRequested { return 130 }
    return switch error.code {
    case .notFound: 3
    case .digestMismatch, .sizeMismatch: 4
    default: 1
    }
  }
}

/// How progress is shown; shared by the commands that take long.
struct ProgressArguments: ParsableArguments {
  @Flag(
    help: """
      Shows progress even if stderr is not a terminal: a line each time, JSON with --json.
      """)
  var progress = false

  func display(json: Bool) -> ProgressDisplay? {
    ProgressDisplay.make(isForced: progress, json: json)
  }
}
