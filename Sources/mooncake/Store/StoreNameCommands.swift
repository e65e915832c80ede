import ArgumentParser
import Glibc
import MooncakeEngine
import MooncakeP2P
import MooncakeSystem

/// Prints on stderr which entries were skipped. The log has it, too, if it is not silent.
private func printSkipped(_ store: P2PStore) {
  if getenv("MC_LOG_LEVEL") != nil { return }
  for text in store.passedOver { printError("mooncake: \(text)") }
}

/// Lists payloads.
struct StoreListCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "list", abstract: "Lists the payloads whose names begin with a prefix.")

  @OptionGroup var store: StoreArguments

  @Argument(help: "Prefix of the names; default: all.")
  var prefix = ""

  func run() throws {
    let stop = try StopRequest()
    silenceLog()
    try store.withStore(stop) { payloads in
      StoreReport(isJSON: store.json).print(
        listed: try payloads.list(prefix: prefix, store.operation(stop)))
      printSkipped(payloads)
    }
  }
}

/// Prints one payload.
struct StoreStatCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "stat", abstract: "Prints a payload's version, sizes and holders.")

  @OptionGroup var store: StoreArguments

  @Argument(help: "Name of the payload.")
  var name: String

  func run() throws {
    let stop = try StopRequest()
    silenceLog()
    try store.withStore(stop) { payloads in
      let (info, holders) = try payloads.describe(name, store.operation(stop))
      StoreReport(isJSON: store.json).print(info, holders: holders)
      printSkipped(payloads)
    }
  }
}

/// Follows payloads.
struct StoreWatchCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "watch",
    abstract: "Prints payloads that are there, and then each that comes, changes or goes.")

  @OptionGroup var store: StoreArguments

  @Argument(help: "Prefix of the names; default: all.")
  var prefix = ""

  @Option(help: "Ends after this time, such as 30s or 10m.")
  var duration: TimeSpan?

  func run() throws {
    let stop = try StopRequest()
    try store.withStore(stop) { payloads in
      let report = StoreReport(isJSON: store.json)
      let watch = try payloads.watch(prefix: prefix) { report.print($0) }
      let end = duration.map { Deadline(nanoseconds: Clock.now() &+ $0.nanoseconds) } ?? .never
      stop.wait(until: end, orEndOfOutput: true)
      watch.stop()
    }
  }
}

/// Removes a name.
struct StoreRemoveCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "rm",
    abstract: "Removes a name; every holder withdraws the version that it has.",
    discussion: "Files stay where they are. `publish` and `serve` of the name end with an error.")

  @OptionGroup var store: StoreArguments

  @Argument(help: "Name of the payload.")
  var name: String

  func run() throws {
    let stop = try StopRequest()
    silenceLog()
    try store.withStore(stop) { payloads in
      try payloads.remove(name, store.operation(stop))
      if store.json {
        var line = JSONObject()
        line.add("removed", name)
        printLine(line.text)
      } else {
        printLine("removed \(name)")
      }
    }
  }
}
