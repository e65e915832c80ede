import ArgumentParser
import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeMetadata
import MooncakeSystem

/// The service and how long to wait for it; shared by the commands that use one.
struct MetadataArguments: ParsableArguments {
  @OptionGroup var service: ServiceArguments

  @Option(
    help: """
      How long to wait for the service, such as 5 or 500ms; default: 5 seconds, and no limit \
      for `watch`.
      """)
  var timeout: TimeSpan?

  @Flag(help: "Prints JSON, one object a line.")
  var json = false

  func validate() throws { try requireTimeout(timeout, atMost: 600) }

  func open() throws -> any MetadataService {
    try MetadataServices.open(MetadataURI(parsing: service.uri))
  }

  var call: Call {
    Call(until: .after(milliseconds: timeout?.milliseconds ?? 5000))
  }

  func print(_ entry: MetadataEntry, withValue: Bool = true) {
    if json {
      printLine(Self.json(entry, withValue: withValue).text)
    } else {
      printLine(withValue ? "\(entry.key)\t\(Self.oneLine(entry.value))" : entry.key)
    }
  }

  static func json(_ entry: MetadataEntry, withValue: Bool) -> JSONObject {
    var line = JSONObject()
    line.add("key", entry.key)
    if withValue { line.add("value", entry.value) }
    return line
  }

  static func oneLine(_ text: String) -> String {
    var text = text[...]
    while text.last?.isNewline == true { text.removeLast() }
    return text.replacing(where: \.isNewline, with: " ")
  }
}

extension Substring {
  fileprivate func replacing(where matches: (Character) -> Bool, with other: Character) -> String {
    String(map { matches($0) ? other : $0 })
  }
}

/// Prints the value of a key.
struct MetadataGetCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "get", abstract: "Prints the value of a key; exit code 1 if there is none.")

  @OptionGroup var service: MetadataArguments

  @Argument(help: "The whole key, such as mooncake/ram/10.0.0.5:15321.")
  var key: String

  func run() throws {
    try reportingErrors {
      let store = try service.open()
      guard let value = try store.get(key, service.call) else {
        throw MooncakeError(.notFound, "metadata \(store.uri): there is no key '\(key)'")
      }
      if service.json {
        service.print(MetadataEntry(key: key, value: value))
      } else {
        Output.write(value.last?.isNewline == true ? value : value + "\n")
      }
    }
  }
}

/// Puts a value under a key.
struct MetadataPutCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "put", abstract: "Puts a value under a key, replacing the former one.")

  @OptionGroup var service: MetadataArguments

  @Argument(help: "The whole key.")
  var key: String

  @Argument(help: "The value; - reads it from stdin.")
  var value: String

  @Option(help: "The key vanishes after this time, 100ms to 1h, such as 30s or 10m.")
  var ttl: TimeSpan?

  @Flag(help: "Changes nothing, and exits with 1, if the key exists.")
  var ifAbsent = false

  /// Lease times that every service grants.
  private static let ttlMilliseconds: ClosedRange<UInt64> = 100...3_600_000

  func validate() throws {
    if let ttl, !Self.ttlMilliseconds.contains(ttl.milliseconds) {
      throw ValidationError("--ttl must be between 100ms and 1h.")
    }
  }

  func run() throws {
    try reportingErrors {
      let store = try service.open()
      let entry = MetadataEntry(key: key, value: value == "-" ? try standardInput() : value)
      let lease = try ttl.flatMap { span in
        try store.grant(ttlMilliseconds: span.milliseconds, service.call)
      }
      if ttl != nil && lease == nil {
        throw MooncakeError(
          .unsupported, "metadata \(store.uri): this server has no leases, so a key cannot expire")
      }
      do throws(MooncakeError) {
        try put(entry, lease, store)
      } catch {
        // End the unused lease, since services limit their number. Without the entry: given it,
        // Redis would remove an equal value that somebody else has put.
        if lease != nil {
          try? store.revoke(lease, [], Call(until: .after(milliseconds: 2000)))
        }
        throw error
      }
      if service.json { service.print(entry) }
    }
  }

  private func put(
    _ entry: MetadataEntry, _ lease: MetadataLease?, _ store: any MetadataService
  ) throws(MooncakeError) {
    if !ifAbsent { return try store.put(entry, lease: lease, service.call) }
    if try !store.putIfAbsent(entry, lease: lease, service.call) {
      throw MooncakeError(.busy, "metadata \(store.uri): the key '\(key)' exists already")
    }
  }

  private func standardInput() throws(MooncakeError) -> String {
    var bytes: [UInt8] = []
    var chunk = [UInt8](repeating: 0, count: 64 << 10)
    while true {
      let count = chunk.withUnsafeMutableBytes { read(STDIN_FILENO, $0.baseAddress, $0.count) }
      if count == 0 { break }
      if count < 0 { throw MooncakeError(.system, "reading stdin: \(Errno.current)") }
      bytes += chunk[..<count]
    }
    guard let text = String(validating: bytes, as: UTF8.self) else {
      throw MooncakeError(.invalidArgument, "the value on stdin is not UTF-8")
    }
    return text
  }
}

/// Deletes a key.
struct MetadataDeleteCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "delete", abstract: "Deletes a key; exit code 1 if it does not exist.")

  @OptionGroup var service: MetadataArguments

  @Argument(help: "The whole key.")
  var key: String

  func run() throws {
    try reportingErrors {
      let store = try service.open()
      if try !store.delete(key, service.call) {
        throw MooncakeError(.notFound, "metadata \(store.uri): there is no key '\(key)'")
      }
      if service.json {
        service.print(MetadataEntry(key: key, value: ""), withValue: false)
      }
    }
  }
}

/// Lists keys.
struct MetadataListCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "list", abstract: "Lists the keys with a prefix, one a line.")

  @OptionGroup var service: MetadataArguments

  @Argument(help: "Prefix of the keys.")
  var prefix = "mooncake/"

  @Flag(help: "Prints each value after its key.")
  var values = false

  func run() throws {
    try reportingErrors {
      let store = try service.open()
      for entry in try store.listAll(prefix: prefix, service.call).entries {
        service.print(entry, withValue: values)
      }
    }
  }
}

/// Follows keys.
struct MetadataWatchCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "watch",
    abstract: "Prints the keys with a prefix, and then each change, until it is stopped.",
    discussion: """
      If the service cannot be reached, waits for it as long as --timeout says; each failure is \
      printed on stderr.
      """)

  @OptionGroup var service: MetadataArguments

  @Argument(help: "Prefix of the keys.")
  var prefix = "mooncake/"

  @Flag(help: "Prints each value after its key.")
  var values = false

  @Option(help: "Ends after this time, such as 30s or 10m.")
  var duration: TimeSpan?

  func run() throws {
    let stop = try StopRequest()
    try reportingErrors {
      let store = try service.open()
      let watch = MetadataWatch(store, prefix: prefix)
      let end = duration.map { Deadline(nanoseconds: Clock.now() &+ $0.nanoseconds) } ?? .never
      var patience = self.patience
      while !stop.isRequested && !end.hasPassed && !Output.hasFailed && !Output.isClosed {
        // Wait briefly, to notice a service that hangs and a reader that has gone.
        let wait = max(min(patience, .after(milliseconds: 2000)), .after(milliseconds: 1000))
        let listing = service.timeout == nil ? .after(milliseconds: 30_000) : patience
        do throws(MooncakeError) {
          let changes = try watch.next(
            call(until: min(end, wait), stop), listing: call(until: min(end, listing), stop))
          for change in changes { print(change) }
          patience = self.patience
        } catch {
          if stop.isRequested { break }
          if error.code == .unsupported || error.code == .accessDenied || patience.hasPassed {
            throw error
          }
          printError("mooncake: \(error.message)")
          let pause = min(min(end, patience), .after(milliseconds: 500))
          stop.wait(until: pause, orEndOfOutput: true)
        }
      }
    }
  }

  private func call(until deadline: Deadline, _ stop: StopRequest) -> Call {
    Call(until: deadline, cancellation: stop.descriptor)
  }

  /// Until when the service may be unreachable.
  private var patience: Deadline {
    service.timeout.map { .after(milliseconds: $0.milliseconds) } ?? .never
  }

  private func print(_ change: MetadataChange) {
    if service.json {
      var line = JSONObject()
      switch change {
      case .put(let entry):
        line.add("change", "put")
        line.add("key", entry.key)
        if values { line.add("value", entry.value) }
      case .delete(let key):
        line.add("change", "delete")
        line.add("key", key)
      }
      return printLine(line.text)
    }
    switch change {
    case .put(let entry):
      printLine(
        "put \(entry.key)" + (values ? "\t\(MetadataArguments.oneLine(entry.value))" : ""))
    case .delete(let key): printLine("delete \(key)")
    }
  }
}
