import MooncakeBase
import MooncakeEngine
import MooncakeSystem
import Synchronization

/// Local files that a store offers as a payload. They must not change; `check` tells whether they
/// have.
public final class PayloadFiles: Sendable {
  public let name: String
  /// Their paths, for display: bytes that are not UTF-8 are replaced.
  public let paths: [String]
  private let store: P2PStore
  private let isOrigin: Bool
  private let holding: UInt64?
  private let files: Lock<[MappedFile]>

  init(_ store: P2PStore, _ name: String, isOrigin: Bool, _ files: [MappedFile]) {
    self.store = store
    self.name = name
    self.isOrigin = isOrigin
    paths = files.map(\.path.description)
    holding = store.catalog.holding(of: name)?.address.holding
    self.files = Lock(files)
  }

  deinit {
    do throws(MooncakeError) { try withdraw() } catch {
      // A call is using the name: the memory must outlive its end in the store.
      if error.code == .busy { store.keep(files.withLock { $0 }) }
    }
  }

  /// Throws if a file has changed, naming it, or if the payload is no longer offered because
  /// somebody removed its name.
  public func check() throws(MooncakeError) {
    for file in files.withLock({ $0 }) { try file.check() }
    if let holding, store.catalog.holding(of: name)?.address.holding != holding {
      throw MooncakeError(.notHeld, "payload '\(name)' was removed by its name")
    }
  }

  /// Ends the offer. The files stay where they are, and nobody reads them when this returns.
  /// Idempotent.
  public func withdraw(_ operation: StoreOperation = StoreOperation()) throws(MooncakeError) {
    if files.withLock({ $0.isEmpty }) { return }
    let present = store.catalog.holding(of: name)?.address.holding
    // Otherwise this offer has ended, and the store holds another payload of that name.
    if present == nil || present == holding {
      do throws(MooncakeError) {
        if isOrigin {
          try store.unregister(name, operation)
        } else {
          try store.deleteReplica(name, operation)
        }
      } catch {
        // The store does not hold it, or was closed: nobody reads it.
        if error.code != .notHeld && error.code != .invalidHandle { throw error }
      }
    }
    // After a new version, a peer may still be in the middle of a copy of the old one.
    try store.endMemory(of: files.withLock { $0 }, "withdrawing payload '\(name)'", operation)
    files.withLock { $0 = [] }
  }
}

/// How fetched files are written.
public struct FileOptions: Sendable {
  /// Replaces existing files instead of failing before anything is fetched.
  public var replacesFiles = false
  /// Returns only once the files would survive a loss of power.
  public var syncs = false

  public init() {}
}

extension P2PStore {
  /// Publishes one directory, or files and directories, as one payload. One directory is listed by
  /// its contents, several paths each under its last name. The files are mapped, not copied; nobody
  /// may write to them until the payload is withdrawn.
  public func publish(
    _ name: String, files paths: [String], _ options: RegisterOptions = RegisterOptions(),
    _ operation: StoreOperation = StoreOperation()
  ) throws(MooncakeError) -> (info: PayloadInfo, files: PayloadFiles) {
    try publish(name, files: paths.map { FilePath($0) }, options, operation)
  }

  /// The same for paths that need not be UTF-8.
  public func publish(
    _ name: String, files paths: [FilePath], _ options: RegisterOptions = RegisterOptions(),
    _ operation: StoreOperation = StoreOperation()
  ) throws(MooncakeError) -> (info: PayloadInfo, files: PayloadFiles) {
    if options.isWritable {
      throw MooncakeError(
        .invalidArgument, "payload '\(name)': files are published for reading only")
    }
    let found = try FileTree.files(of: paths)
    let arena = try FileArena(sizes: found.map(\.size), "payload '\(name)'")
    var files: [MappedFile] = []
    var listed: [FileList.File] = []
    for (index, item) in found.enumerated() {
      let file = try MappedFile(reading: item.path, size: item.size, in: arena, index: index)
      listed.append(.init(path: item.name, size: file.size, isExecutable: file.isExecutable))
      files.append(file)
    }
    var options = options
    options.attributes = try FileList(listed).json
    // Empty files are only in the list.
    let filled = files.filter { $0.buffer != nil }
    let layout = try Self.layout(name, filled.compactMap(\.buffer), in: arena.buffer)
    let info: PayloadInfo
    do throws(MooncakeError) {
      info = try register(name, layout, options, operation) { piece, pause throws(MooncakeError) in
        try filled[piece.buffer].digest(
          offset: piece.offset, length: piece.length, pause: pause)
      }
    } catch {
      if !memory.ending(among: layout.ranges.map(\.address)).isEmpty { arena.keep() }
      throw error
    }
    let result = PayloadFiles(self, name, isOrigin: true, files)
    // A file hashed early may have changed while later ones were hashed.
    do throws(MooncakeError) { try result.check() } catch {
      try result.withdraw(operation)
      throw error
    }
    return (info, result)
  }

  /// Fetches a payload into files below a directory, which is made if missing. No file gets its
  /// name before all are complete and verified; a failure leaves nothing. A payload without a list
  /// of files becomes one file, named after the last part of the payload's name. If the options say
  /// so, the files are offered to others until they are withdrawn.
  public func get(
    _ name: String, to directory: String, _ fileOptions: FileOptions = FileOptions(),
    _ options: GetOptions = GetOptions(), _ operation: StoreOperation = StoreOperation()
  ) throws(MooncakeError) -> (result: GetResult, files: PayloadFiles) {
    try get(name, to: FilePath(directory), fileOptions, options, operation)
  }

  /// The same for a directory whose path need not be UTF-8.
  public func get(
    _ name: String, to directory: FilePath, _ fileOptions: FileOptions = FileOptions(),
    _ options: GetOptions = GetOptions(), _ operation: StoreOperation = StoreOperation()
  ) throws(MooncakeError) -> (result: GetResult, files: PayloadFiles) {
    if directory.bytes.isEmpty { throw MooncakeError(.invalidArgument, "no directory is named") }
    let staging = FileStaging(
      directory: directory, payload: name, replacesFiles: fileOptions.replacesFiles)
    let bounds = bounds(operation, "getting payload '\(name)'", defaultMilliseconds: 0)
    var ranges: [PayloadBuffer] = []
    do throws(MooncakeError) {
      let result = try get(name, options, operation) { manifest throws(MooncakeError) in
        let (buffers, range) = try staging.place(manifest)
        ranges = range.map { [$0] } ?? buffers
        return (buffers, range, [])
      }
      let holding = catalog.holding(of: name)?.address.holding
      do throws(MooncakeError) {
        let files = try staging.commit(syncs: fileOptions.syncs, bounds)
        return (result, PayloadFiles(self, name, isOrigin: false, files))
      } catch {
        // Before the memory goes.
        if !endReplica(name, holding) { staging.keepMemory() }
        throw error
      }
    } catch {
      let addresses = ranges.map { UInt64(UInt(bitPattern: $0.address)) }
      if !memory.ending(among: addresses).isEmpty { staging.keepMemory() }
      staging.discard()
      throw error
    }
  }

  /// Returns once nobody reads the memory of files that are no longer offered; throws BUSY
  /// otherwise.
  fileprivate func endMemory(
    of files: [MappedFile], _ what: String, _ operation: StoreOperation
  ) throws(MooncakeError) {
    let addresses = memory.ending(among: files.compactMap(\.memoryAddress))
    if addresses.isEmpty { return }
    let bounds = bounds(operation, what, defaultMilliseconds: engine.defaultTimeoutMilliseconds)
    try memory.finish(addresses, bounds.call)
  }

  /// Ends a replica, even while another call is ending it; false if it may still be read.
  /// `holding`: its number, if it has one.
  private func endReplica(_ name: String, _ holding: UInt64?) -> Bool {
    let deadline = Deadline.after(milliseconds: drainMilliseconds &+ 10_000)
    while true {
      // Otherwise it has ended, and the store holds another payload of that name.
      let present = catalog.holding(of: name)?.address.holding
      if let present, let holding, present != holding { return true }
      do throws(MooncakeError) {
        try deleteReplica(name)
        return true
      } catch {
        if error.code == .notHeld || error.code == .invalidHandle { return true }
        if error.code != .busy || deadline.hasPassed { return false }
      }
      sleepBriefly(nanoseconds: 2_000_000)
    }
  }
}
