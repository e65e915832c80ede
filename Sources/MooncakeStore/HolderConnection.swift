import MooncakeEngine
import MooncakeSystem

/// A holder of a payload, ready to be read: its segment is open and its addresses are known.
package struct HolderConnection: Sendable {
  package let holder: HolderAddress
  package let segment: SegmentID
  package let layout: BufferLayout

  private struct Index: Sendable {
    var version: PayloadVersion
    var manifestAddress: UInt64
    var manifestBytes: UInt64
    var tableAddress: UInt64
    var bufferCount: UInt64
  }

  /// Asks the holder where things are and reads the table of its buffers. `completion` is called
  /// soon after the deadline at the latest, and must not wait.
  package static func open(
    _ engine: TransferEngine, _ workers: WorkerPool, _ holder: HolderAddress,
    _ manifest: Manifest, until deadline: Deadline,
    _ completion: @escaping StoreService.Completion<HolderConnection>
  ) {
    let body: Visit<HolderConnection> = { index, deadline throws(EngineError) in
      try connect(engine, holder, manifest, index, deadline)
    }
    visit(engine, workers, holder, manifest.version, deadline, reached: {}, completion, body)
  }

  private typealias Visit<Value> = @Sendable (Index, Deadline) throws(EngineError) -> Value

  /// Silence costs no thread: only a holder that has answered is given a worker, which blocks. The
  /// time until one is free is none of the holder's.
  private static func visit<Value: Sendable>(
    _ engine: TransferEngine, _ workers: WorkerPool, _ holder: HolderAddress,
    _ version: PayloadVersion, _ deadline: Deadline, reached: @escaping @Sendable () -> Void,
    _ completion: @escaping StoreService.Completion<Value>,
    _ body: @escaping Visit<Value>
  ) {
    askIndex(engine, holder, deadline) { result in
      let index: Index
      do throws(EngineError) {
        index = try result.get()
        guard index.version == version else { throw gone(holder) }
      } catch {
        return completion(.failure(error))
      }
      reached()
      let left = deadline == .never ? nil : deadline.remainingNanoseconds / 1_000_000
      let isAccepted = workers.run {
        do throws(EngineError) {
          let own = left.map { Deadline.after(milliseconds: max(1, $0)) } ?? .never
          completion(.success(try body(index, own)))
        } catch {
          completion(.failure(error))
        }
      }
      if !isAccepted {
        completion(.failure(EngineError(.canceled, "the store is closing")))
      }
    }
  }

  private static func connect(
    _ engine: TransferEngine, _ holder: HolderAddress, _ manifest: Manifest, _ index: Index,
    _ deadline: Deadline
  ) throws(EngineError) -> HolderConnection {
    let segment = try engine.openSegment(
      holder.segment, timeoutMilliseconds: milliseconds(until: deadline))
    do throws(EngineError) {
      let bytes = try read(
        engine, segment, index.tableAddress,
        index.bufferCount * UInt64(Holding.rowBytes), deadline)
      guard let layout = layout(bytes, size: manifest.layout.size) else {
        throw EngineError(
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

  /// Reads the manifest of a version from a holder; `reached` is called when the holder has said
  /// where it lies.
  package static func fetchManifest(
    _ engine: TransferEngine, _ workers: WorkerPool, _ holder: HolderAddress,
    _ version: PayloadVersion, until deadline: Deadline,
    reached: @escaping @Sendable () -> Void,
    _ completion: @escaping StoreService.Completion<Manifest>
  ) {
    let body: Visit<Manifest> = { index, deadline throws(EngineError) in
      try readManifest(engine, holder, version, index, deadline)
    }
    visit(engine, workers, holder, version, deadline, reached: reached, completion, body)
  }

  private static func readManifest(
    _ engine: TransferEngine, _ holder: HolderAddress, _ version: PayloadVersion,
    _ index: Index, _ deadline: Deadline
  ) throws(EngineError) -> Manifest {
    let segment = try engine.openSegment(
      holder.segment, timeoutMilliseconds: milliseconds(until: deadline))
    defer { try? engine.closeSegment(segment) }
    let bytes = try read(engine, segment, index.manifestAddress, index.manifestBytes, deadline)
    let manifest: Manifest
    do throws(EngineError) {
      manifest = try Manifest(parsing: bytes)
    } catch {
      throw EngineError(error.code, "holder \(holder.segment): \(error.message)")
    }
    guard manifest.version == version else {
      throw EngineError(
        .digestMismatch,
        "holder \(holder.segment): its manifest is not that of version \(version)")
    }
    return manifest
  }

  private static func gone(_ holder: HolderAddress) -> EngineError {
    EngineError(.notFound, "holder \(holder.segment): it holds this version no longer")
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
          do throws(EngineError) {
            return .success(try parseIndex(answer, holder))
          } catch {
            return .failure(error)
          }
        })
    }
  }

  private static func parseIndex(
    _ answer: String, _ holder: HolderAddress
  ) throws(EngineError) -> Index {
    if answer == RPCAnswer.noService { throw gone(holder) }
    let document: JSONDocument
    do throws(JSONError) { document = try JSONDocument(parsing: answer) } catch {
      throw EngineError(
        .protocolViolation, "holder \(holder.segment): its answer is no JSON: \(error)")
    }
    let index: Index?
    do throws(EngineError) {
      index = try document.read(parse)
    } catch {
      throw EngineError(error.code, "holder \(holder.segment): \(error.message)")
    }
    guard let index else { throw gone(holder) }
    return index
  }

  /// nil: it holds this no longer.
  private static func parse(_ value: JSONValue) throws(EngineError) -> Index? {
    try StoreVersion.checkAnswer(value)
    if value["state"]?.unsigned == ShardAnswer.State.gone.rawValue { return nil }
    guard let version = value["version"]?.string.flatMap({ PayloadVersion($0) }),
      let manifestAddress = value["manifest_address"]?.unsigned,
      let manifestBytes = value["manifest_bytes"]?.unsigned,
      (1...UInt64(Manifest.maximumBytes)).contains(manifestBytes),
      let tableAddress = value["table_address"]?.unsigned,
      let bufferCount = value["buffers"]?.unsigned,
      bufferCount <= UInt64(ShardLayout.maximumBufferCount)
    else { throw EngineError(.protocolViolation, "its answer does not say where things are") }
    return Index(
      version: version, manifestAddress: manifestAddress, manifestBytes: manifestBytes,
      tableAddress: tableAddress, bufferCount: bufferCount)
  }

  private static func read(
    _ engine: TransferEngine, _ segment: SegmentID, _ address: UInt64, _ length: UInt64,
    _ deadline: Deadline
  ) throws(EngineError) -> [UInt8] {
    var bytes = [UInt8](repeating: 0, count: Int(length))
    if length == 0 { return bytes }
    let timeout = milliseconds(until: deadline)
    do {
      try bytes.withUnsafeMutableBytes { memory in
        let request = TransferRequest(
          opcode: .read, segment: segment, source: memory.baseAddress, targetOffset: address,
          length: length)
        try withUnsafePointer(to: request) { pointer in
          try engine.transfer(
            UnsafeBufferPointer(start: pointer, count: 1), timeoutMilliseconds: timeout)
        }
      }
    } catch let error as EngineError {
      throw error
    } catch {
      throw EngineError(.system, "\(error)")
    }
    return bytes
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

  /// What is left, at least 1: 0 would mean the default.
  static func milliseconds(until deadline: Deadline) -> UInt64 {
    deadline == .never ? 0 : max(1, deadline.remainingNanoseconds / 1_000_000)
  }
}
