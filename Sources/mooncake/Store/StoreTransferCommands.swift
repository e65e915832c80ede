import ArgumentParser
import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeP2P
import MooncakeSystem

/// Publishes files and stays as their holder.
struct StorePublishCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "publish",
    abstract: "Publishes files or a directory under a name until it is stopped.",
    discussion: """
      A single directory is published with its contents, several paths each under its last name; \
      links to files count as files. Files are served from where they are, so they must not change \
      meanwhile: a change ends the program with an error. Prints a line once others can \
      fetch. On SIGINT or SIGTERM it gives readers a few seconds to finish, and ends.
      """)

  @OptionGroup var store: StoreArguments
  @OptionGroup var progress: ProgressArguments

  @Argument(help: "Files and directories.", completion: .file())
  var paths: [FilePath]

  @Option(help: "Name of the payload, such as models/llama/7.")
  var name: String

  @Option(help: "Bytes of a shard, such as 8MiB; default: by the payload's size.")
  var shardSize: ByteCount?

  @Flag(help: "Fails if the name is taken, instead of making a new version of it.")
  var createOnly = false

  @Option(help: "Device that the memory is near, such as cpu:0; default: detected.")
  var location = "*"

  @Option(help: "Writes the JSON line into this file once others can fetch.", completion: .file())
  var readyFile: FilePath?

  func validate() throws {
    if let shardSize { try require(1...(1 << 32), shardSize.value, "--shard-size") }
  }

  func run() throws {
    let stop = try StopRequest()
    let report = StoreReport(isJSON: store.json)
    try store.withStore(stop) { payloads in
      let display = progress.display(json: store.json)
      var options = RegisterOptions()
      options.shardBytes = shardSize?.value ?? 0
      options.isCreateOnly = createOnly
      options.location = location
      let (info, files) = try payloads.publish(
        name, files: paths, options, store.operation(stop, display))
      display?.end()
      if let readyFile { try write(report.published(info, files.paths), to: readyFile) }
      report.print(published: info, files: files.paths)
      try Output.check()
      try hold(payloads, name, files, stop, json: store.json)
    }
  }

  /// Writes the file so that it is complete as soon as it is visible.
  private func write(_ line: String, to path: FilePath) throws(MooncakeError) {
    let temporary = FilePath(bytes: path.bytes + ".part".utf8)
    do throws(Errno) {
      let file = try FileDescriptor.open(
        temporary, flags: O_WRONLY | O_CREAT | O_TRUNC, mode: 0o644)
      var text = line + "\n"
      let count = try retryingInterrupts {
        text.withUTF8 { Glibc.write(file.rawValue, $0.baseAddress, $0.count) }
      }
      if count != text.utf8.count { throw Errno(ENOSPC) }
      _ = try retryingInterrupts {
        temporary.withCString { from in path.withCString { rename(from, $0) } }
      }
    } catch {
      _ = temporary.withCString { unlink($0) }
      throw MooncakeError(.system, "\(path): \(error)")
    }
  }
}

/// Fetches a payload and ends.
struct StoreGetCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "get",
    abstract: "Fetches a payload; others fetch from this process while it does.",
    discussion: """
      With --to, files get their names only when all of them are complete and verified; on any \
      failure, and on SIGINT or SIGTERM, no file is left. Without it the payload goes to memory \
      only, which measures the speed. To stay as a holder, use `mooncake store serve`.
      """)

  @OptionGroup var store: StoreArguments
  @OptionGroup var progress: ProgressArguments
  @OptionGroup var fetch: FetchArguments

  func run() throws {
    let stop = try StopRequest()
    silenceLog()
    try store.withStore(stop) { payloads in
      _ = try fetch.run(payloads, store, progress, stop)
    }
  }
}

/// Fetches a payload and stays as a holder.
struct StoreServeCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "serve",
    abstract: "Fetches a payload and then offers it to others until it is stopped.",
    discussion: """
      Prints the same line as `get` once the payload is complete. Files of --to stay when the \
      program ends. On SIGINT or SIGTERM it gives readers a few seconds to finish, and ends.
      """)

  @OptionGroup var store: StoreArguments
  @OptionGroup var progress: ProgressArguments
  @OptionGroup var fetch: FetchArguments

  func run() throws {
    let stop = try StopRequest()
    try store.withStore(stop) { payloads in
      let files = try fetch.run(payloads, store, progress, stop)
      try Output.check()
      try hold(payloads, fetch.name, files, stop, json: store.json)
    }
  }
}

/// What to fetch and where to put it.
struct FetchArguments: ParsableArguments {
  @Argument(help: "Name of the payload.")
  var name: String

  @Option(
    help: "Directory for the files; created if missing. Default: memory only.",
    completion: .directory)
  var to: FilePath?

  @Option(help: "Only this version, 32 hexadecimal digits; default: the current one.")
  var payloadVersion: PayloadVersion?

  @Flag(help: "Starts over if the version is replaced by another one meanwhile.")
  var follow = false

  @Flag(help: "Replaces existing files.")
  var force = false

  @Flag(help: "Ends only when the files would survive a power failure.")
  var sync = false

  func validate() throws {
    if to == nil && (force || sync) {
      throw ValidationError("--force and --sync are for files; give a directory with --to.")
    }
  }

  /// Fetches the payload and prints the result; returns the files, if any.
  func run(
    _ payloads: P2PStore, _ store: StoreArguments, _ progress: ProgressArguments,
    _ stop: StopRequest
  ) throws -> PayloadFiles? {
    let display = progress.display(json: store.json)
    let operation = store.operation(stop, display)
    var options = GetOptions()
    options.version = payloadVersion
    options.followsVersions = follow
    let report = StoreReport(isJSON: store.json)
    guard let to else {
      let result = try payloads.get(name, into: nil, options, operation)
      display?.end()
      report.print(result, files: [])
      return nil
    }
    var fileOptions = FileOptions()
    fileOptions.replacesFiles = force
    fileOptions.syncs = sync
    let (result, files) = try payloads.get(name, to: to, fileOptions, options, operation)
    display?.end()
    report.print(result, files: files.paths)
    return files
  }
}

extension PayloadVersion: ExpressibleByArgument {
  public init?(argument: String) { self.init(argument) }
}

/// Offers a payload until a signal arrives or it is removed.
private func hold(
  _ payloads: P2PStore, _ name: String, _ files: PayloadFiles?, _ stop: StopRequest, json: Bool
) throws(MooncakeError) {
  let readers = payloads.readers(of: name)
  while !stop.isRequested {
    let begin = Clock.now()
    try files?.check()
    // Checking thousands of files must not keep a processor busy.
    let pause = max(1_000_000_000, 50 &* (Clock.now() &- begin))
    stop.wait(until: Deadline(nanoseconds: Clock.now() &+ pause), orEndOfInput: false)
  }
  try files?.withdraw()
  // Readers on this host copy from shared memory themselves and report how much.
  let sent = EngineCounters(payloads.engine).sentOverTCP
  let read = readers?.readBytes ?? 0
  let byMemory = read - min(read, sent)
  if json {
    var line = JSONObject()
    line.add("sent_bytes", sent)
    line.add("memory_bytes", byMemory)
    printLine(line.text)
  } else if byMemory == 0 {
    printLine("sent \(readableBytes(sent)) over TCP")
  } else {
    printLine(
      "sent \(readableBytes(sent)) over TCP, and processes of this host read "
        + "\(readableBytes(byMemory)) from memory")
  }
}
