import MooncakeBase
import MooncakeEngine
import MooncakeSystem

/// A holder of a payload, ready to be read: its segment is open and its addresses are known.
package struct HolderConnection: Sendable {
  package let holder: HolderAddress
  package let segment: SegmentID
  package let layout: BufferLayout

  /// A holder's answer to the first question: where its manifest and its table of buffers are.
  package struct Index: Sendable {
    fileprivate var version: PayloadVersion
    fileprivate var manifestAddress: UInt64
    fileprivate var manifestBytes: UInt64
    fileprivate var tableAddress: UInt64
    fileprivate var bufferCount: UInt64
  }

  /// Whoever waits for data from a holder.
  package struct Recipient: Sendable {
    /// Whether the data is still wanted. Nothing else ends a read while bytes arrive.
    package var isWaiting: @Sendable () -> Bool
    /// Called when the holder has told where things are.
    package var reached: @Sendable () -> Void = {}
    /// Called now and then while bytes arrive.
    package var progressed: @Sendable () -> Void = {}

    package init(isWaiting: @escaping @Sendable () -> Bool) { self.isWaiting = isWaiting }
  }

  /// Asks the holder where things are, which has until the deadline, and reads the table of its
  /// buffers, for as long as bytes come. `known` is what it answered a moment ago: it is only asked
  /// again if that is of no use any more. `completion` must not wait.
  package static func open(
    _ engine: TransferEngine, _ workers: WorkerPool, _ holder: HolderAddress,
    _ manifest: Manifest, known: Index? = nil, until deadline: Deadline, for recipient: Recipient,
    _ completion: @escaping StoreService.Completion<HolderConnection>
  ) {
    let body: Visit<HolderConnection> = { index, deadline throws(MooncakeError) in
      try connect(engine, holder, manifest, index, deadline, recipient)
    }
    let ask: @Sendable () -> Void = {
      askIndex(engine, holder, deadline) { result in
        visit(workers, holder, manifest.version, result, deadline, recipient, completion, body)
      }
    }
    guard let known else { return ask() }
    visit(
      workers, holder, manifest.version, .success(known), deadline, recipient,
      { result in
        if case .failure = result, recipient.isWaiting(), !deadline.hasPassed { return ask() }
        completion(result)
      }, body)
  }

  private typealias Visit<Value> = @Sendable (Index, Deadline) throws(MooncakeError) -> Value

  /// Goes on with a holder's answer. A silent holder costs no thread: only one that has answered is
  /// given a worker, which blocks. The time until one is free does not count against the holder.
  private static func visit<Value: Sendable>(
    _ workers: WorkerPool, _ holder: HolderAddress, _ version: PayloadVersion,
    _ answer: Result<Index, MooncakeError>, _ deadline: Deadline, _ recipient: Recipient,
    _ completion: @escaping StoreService.Completion<Value>,
    _ body: @escaping Visit<Value>
  ) {
    let index: Index
    do throws(MooncakeError) {
      index = try answer.get()
      guard index.version == version else { throw gone(holder) }
    } catch {
      return completion(.failure(error))
    }
    recipient.reached()
    let left = deadline == .never ? nil : deadline.remainingNanoseconds / 1_000_000
    let isAccepted = workers.run {
      do throws(MooncakeError) {
        let own = left.map { Deadline.after(milliseconds: max(1, $0)) } ?? .never
        completion(.success(try body(index, own)))
      } catch {
        completion(.failure(error))
      }
    }
    if !isAccepted {
      completion(.failure(MooncakeError(.canceled, "the store is closing")))
    }
  }

  private static func connect(
    _ engine: TransferEngine, _ holder: HolderAddress, _ manifest: Manifest, _ index: Index,
    _ deadline: Deadline, _ recipient: Recipient
  ) throws(MooncakeError) -> HolderConnection {
    let segment = try engine.openSegment(
      holder.segment, timeoutMilliseconds: milliseconds(until: deadline))
    do throws(MooncakeError) {
      let bytes = try read(
        engine, segment, index.tableAddress,
        index.bufferCount * UInt64(Holding.rowBytes), recipient)
      guard let layout = layout(bytes, size: manifest.layout.size) else {
        throw MooncakeError(
          .protocolViolation,
          "holder \(holder.segment): its table of buffers is malformed: is its memory intact?")
      }
      return HolderConnection(holder: holder, segment: segment, layout: layout)
    } catch {
      try? engine.closeSegment(segment)
      throw error
    }
  }

  package func close(_ engine: TransferEngine) { try? engine.closeSegment(segment) }

  /// Reads the manifest of a version from a holder; the index is for opening the holder afterwards.
  /// Only the question where things are has a deadline.
  package static func fetchManifest(
    _ engine: TransferEngine, _ workers: WorkerPool, _ record: HolderRecord,
    until deadline: Deadline, for recipient: Recipient,
    _ completion: @escaping StoreService.Completion<(Manifest, Index)>
  ) {
    let body: Visit<(Manifest, Index)> = { index, deadline throws(MooncakeError) in
      (try readManifest(engine, record, index, deadline, recipient), index)
    }
    askIndex(engine, record.holder, deadline) { result in
      visit(
        workers, record.holder, record.version, result, deadline, recipient, completion, body)
    }
  }

  private static func readManifest(
    _ engine: TransferEngine, _ record: HolderRecord, _ index: Index, _ deadline: Deadline,
    _ recipient: Recipient
  ) throws(MooncakeError) -> Manifest {
    let (holder, version) = (record.holder, record.version)
    let limit = Manifest.mostBytes(
      bufferCount: record.summary.bufferCount, shardCount: record.summary.shardCount)
    guard index.manifestBytes <= limit else {
      throw MooncakeError(
        .protocolViolation,
        "holder \(holder.segment): a manifest of \(index.manifestBytes) bytes is longer than that "
          + "of version \(version) can be")
    }
    let segment = try engine.openSegment(
      holder.segment, timeoutMilliseconds: milliseconds(until: deadline))
    defer { try? engine.closeSegment(segment) }
    let bytes = try read(engine, segment, index.manifestAddress, index.manifestBytes, recipient)
    let manifest: Manifest
    do throws(MooncakeError) {
      manifest = try Manifest(parsing: bytes)
    } catch {
      throw MooncakeError(error.code, "holder \(holder.segment): \(error.message)")
    }
    guard manifest.version == version else {
      throw MooncakeError(
        .digestMismatch,
        "holder \(holder.segment): its manifest is not that of version \(version)")
    }
    return manifest
  }

  private static func gone(_ holder: HolderAddress) -> MooncakeError {
    MooncakeError(.notFound, "holder \(holder.segment): it no longer holds this version")
  }

  private static func askIndex(
    _ engine: TransferEngine, _ holder: HolderAddress, _ deadline: Deadline,
    _ completion: @escaping StoreService.Completion<Index>
  ) {
    var writer = JSONWriter()
    writer.beginObject()
    writer.member("service", StoreService.name)
    writer.member("op", "open")
    writer.storeVersion()
    writer.member("holding", HexNumber.text(holder.holding))
    writer.endObject()
    engine.callService(at: holder.rpc, writer.text, until: deadline) { result in
      completion(
        result.flatMap { answer in
          do throws(MooncakeError) {
            return .success(try parseIndex(answer, holder))
          } catch {
            return .failure(error)
          }
        })
    }
  }

  private static func parseIndex(
    _ answer: String, _ holder: HolderAddress
  ) throws(MooncakeError) -> Index {
    if answer == RPCAnswer.noService { throw gone(holder) }
    let document: JSONDocument
    do throws(JSONError) { document = try JSONDocument(parsing: answer) } catch {
      throw MooncakeError(
        .protocolViolation, "holder \(holder.segment): its answer is not JSON: \(error)")
    }
    let index: Index?
    do throws(MooncakeError) {
      index = try document.read(parse)
    } catch {
      throw MooncakeError(error.code, "holder \(holder.segment): \(error.message)")
    }
    guard let index else { throw gone(holder) }
    return index
  }

  /// nil: the holder no longer has it.
  private static func parse(_ value: JSONValue) throws(MooncakeError) -> Index? {
    try StoreVersion.checkAnswer(value)
    if value["state"]?.unsigned == ShardAnswer.State.gone.rawValue { return nil }
    guard let version = value["version"]?.string.flatMap({ PayloadVersion($0) }),
      let manifestAddress = value["manifest_address"]?.unsigned,
      let manifestBytes = value["manifest_bytes"]?.unsigned,
      (1...UInt64(Manifest.maximumBytes)).contains(manifestBytes),
      let tableAddress = value["table_address"]?.unsigned,
      let bufferCount = value["buffers"]?.unsigned,
      bufferCount <= UInt64(ShardLayout.maximumBufferCount)
    else { throw MooncakeError(.protocolViolation, "its answer does not say where things are") }
    return Index(
      version: version, manifestAddress: manifestAddress, manifestBytes: manifestBytes,
      tableAddress: tableAddress, bufferCount: bufferCount)
  }

  /// Grows the buffer as bytes arrive, doubling it, because the length is only the holder's claim.
  private static func read(
    _ engine: TransferEngine, _ segment: SegmentID, _ address: UInt64, _ length: UInt64,
    _ recipient: Recipient
  ) throws(MooncakeError) -> [UInt8] {
    var bytes: [UInt8] = []
    while bytes.count < Int(length) {
      let start = bytes.count
      let count = min(Int(length) - start, max(start, firstBytes))
      bytes.append(contentsOf: repeatElement(0, count: count))
      do {
        try bytes.withUnsafeMutableBytes { memory in
          let part = UnsafeMutableRawBufferPointer(rebasing: memory[start...])
          try read(engine, segment, address &+ UInt64(start), into: part, recipient)
        }
      } catch let error as MooncakeError {
        throw error
      } catch {
        throw MooncakeError(.system, "\(error)")
      }
    }
    return bytes
  }

  private static let firstBytes = 64 << 10
  private static let tickMilliseconds: UInt64 = 100
  /// A read without a byte for this long has failed.
  private static let silenceMilliseconds: UInt64 = 2000

  /// After a failure nothing writes into the memory any more.
  private static func read(
    _ engine: TransferEngine, _ segment: SegmentID, _ address: UInt64,
    into memory: UnsafeMutableRawBufferPointer, _ recipient: Recipient
  ) throws(MooncakeError) {
    let batch = try engine.createBatch(capacity: 1)
    defer { try? engine.freeBatch(batch) }
    try engine.submit(batch, count: 1, timeoutMilliseconds: .max, notification: nil) { _ in
      RawRequest(
        opcode: Opcode.read.rawValue, segment: segment,
        source: UInt64(UInt(bitPattern: memory.baseAddress)), targetOffset: address,
        length: UInt64(memory.count))
    }
    var watch = ArrivalWatch(engine, batch, from: segment)
    while true {
      do throws(MooncakeError) {
        _ = try engine.wait(batch, timeoutMilliseconds: tickMilliseconds)
      } catch {
        if error.code != .timeout { throw error }
      }
      // Even after a wait that timed out: the read may have ended since.
      let status = try engine.poll(batch)
      if status.state == .completed { return }
      if status.state.isTerminal {
        throw MooncakeError(status.error ?? .canceled, engine.failureMessage(of: batch))
      }
      if watch.hasArrived(engine) { recipient.progressed() }
      let failure: MooncakeError
      if !recipient.isWaiting() {
        failure = MooncakeError(.canceled, "the caller has stopped waiting")
      } else if watch.isSilent(for: silenceMilliseconds) {
        failure = MooncakeError(
          .timeout,
          "it answers, but sends nothing for \(silenceMilliseconds) ms: is its data port "
            + "reachable, and do full-size packets get through (MTU)?")
      } else {
        continue
      }
      try? engine.cancel(batch)
      _ = try? engine.wait(batch)
      throw failure
    }
  }

  private static func layout(_ bytes: [UInt8], size: UInt64) -> BufferLayout? {
    var buffers: [BufferLayout.Buffer] = []
    bytes.withUnsafeBytes { memory in
      for start in stride(from: 0, to: memory.count, by: Holding.rowBytes) {
        buffers.append(
          .init(
            address: UInt64(
              littleEndian: memory.loadUnaligned(fromByteOffset: start, as: UInt64.self)),
            length: UInt64(
              littleEndian: memory.loadUnaligned(fromByteOffset: start + 8, as: UInt64.self))))
      }
    }
    guard let layout = BufferLayout(buffers), layout.size == size else { return nil }
    return layout
  }

  /// The time left, as the engine's calls expect it: at least 1, because 0 means the default; the
  /// maximum for a deadline of never.
  static func milliseconds(until deadline: Deadline) -> UInt64 {
    deadline == .never ? .max : max(1, deadline.remainingNanoseconds / 1_000_000)
  }
}
