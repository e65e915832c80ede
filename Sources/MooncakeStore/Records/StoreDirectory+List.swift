import MooncakeEngine

extension StoreDirectory {
  /// Every payload whose name begins with `start`, in order of names. One that nobody stands for by
  /// name, but that is held, is told as the newest of its holders has it.
  package func list(
    prefix start: String, _ call: MetadataCall
  ) throws(EngineError) -> [PayloadInfo] {
    // Names are bytes: texts that only look alike are different ones.
    var infos: [MetadataKey: PayloadInfo] = [:]
    for entry in try store.listAll(prefix: headKey(start), call).entries {
      guard let head = try? PayloadHead(json: entry.value),
        headKey(head.name).utf8.elementsEqual(entry.key.utf8)
      else { continue }
      infos[MetadataKey(head.name)] = head.summary.info(holderCount: 0)
    }
    let encoded = prefix + "store/holder/" + PercentEncoding.encode(start)
    var headless: [MetadataKey: [HolderRecord]] = [:]
    for entry in try store.listAll(prefix: encoded, call).entries {
      guard let record = record(entry) else { continue }
      let key = MetadataKey(record.name)
      if infos[key] == nil {
        headless[key, default: []].append(record)
      } else if infos[key]?.version == record.version {
        infos[key]?.holderCount += 1
      }
    }
    // The holders of a removed name may not have learned of it yet.
    for (key, removed) in headless.isEmpty ? [:] : try removedVersions(prefix: start, call) {
      headless[key]?.removeAll { $0.version == removed }
    }
    for (key, records) in headless {
      guard let newest = Self.newest(records) else { continue }
      let count = records.count { $0.version == newest.version }
      infos[key] = newest.summary.info(holderCount: UInt64(count))
    }
    return infos.sorted { $0.key < $1.key }.map(\.value)
  }
}
