"""The architectures of vLLM 0.32 and transformers 5 by what they do, as vLLM's registry and transformers' auto classes
group them (`model_executor/models/registry.py`, `models/auto/modeling_auto.py`).

Written down here so that a model can be judged where no vLLM is installed: in the download child, before its weights
are fetched. A test compares the tables with the installed packages. An architecture that is in two of vLLM's groups
stands here under what vLLM does with it by itself. `kinds` reads it.
"""

from __future__ import annotations


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: They continue text.
TEXT_GENERATION = _names(
    """
    AfmoeForCausalLM ApertusForCausalLM ArceeForCausalLM AXK1ForCausalLM BailingMoeForCausalLM
    BailingMoeV2_5ForCausalLM BailingMoeV2ForCausalLM BailingMoeV3ForCausalLM BloomForCausalLM
    ChatGLMForConditionalGeneration ChatGLMModel Cohere2ForCausalLM Cohere2MoeForCausalLM CohereForCausalLM
    CwmForCausalLM DbrxForCausalLM DeciLMForCausalLM DeepseekForCausalLM DeepseekV2ForCausalLM
    DeepseekV32ForCausalLM DeepseekV3ForCausalLM DeepseekV4ForCausalLM Emu3ForConditionalGeneration
    Ernie4_5_MoeForCausalLM Ernie4_5ForCausalLM Exaone4ForCausalLM ExaoneForCausalLM ExaoneMoeForCausalLM
    ExaoneMoEForCausalLM FalconForCausalLM FalconH1ForCausalLM FalconMambaForCausalLM FlexOlmoForCausalLM
    Gemma2ForCausalLM Gemma3ForCausalLM Gemma3nForCausalLM Gemma4ForCausalLM GemmaForCausalLM Glm4ForCausalLM
    Glm4MoeForCausalLM Glm4MoeLiteForCausalLM Glm5NextForCausalLM GlmForCausalLM GlmMoeDsaForCausalLM
    GPT2LMHeadModel GPTBigCodeForCausalLM GPTJForCausalLM GPTNeoXForCausalLM GptOssForCausalLM GraniteForCausalLM
    GraniteMoeForCausalLM GraniteMoeHybridForCausalLM GraniteMoeSharedForCausalLM GraniteMoeSWAForCausalLM
    GraniteSWAForCausalLM HCXVisionV2ForCausalLM HrmTextForCausalLM HunYuanDenseV1ForCausalLM
    HunYuanMoEV1ForCausalLM HunYuanVLForConditionalGeneration HyperCLOVAXForCausalLM HYV3ForCausalLM HYV4ForCausalLM
    InklingForCausalLM InklingForConditionalGeneration InternLM2ForCausalLM InternLM3ForCausalLM
    IQuestCoderForCausalLM IQuestLoopCoderForCausalLM Jais2ForCausalLM JambaForCausalLM K2HorizonForCausalLM
    KimiLinearForCausalLM LagunaForCausalLM Lfm2ForCausalLM Lfm2MoeForCausalLM Llama4ForCausalLM LlamaForCausalLM
    LLaMAForCausalLM LongcatFlashForCausalLM LongcatFlashNgramForCausalLM Mamba2ForCausalLM MambaForCausalLM
    MellumForCausalLM MiMoForCausalLM MiMoV2FlashForCausalLM MiMoV2ForCausalLM MiniCPM3ForCausalLM
    MiniCPMForCausalLM MiniMaxM2ForCausalLM MiniMaxM3SparseForCausalLM Ministral3ForCausalLM MistralForCausalLM
    MistralLarge3ForCausalLM MixtralForCausalLM MuseGlimmerForCausalLM NanbeigeForCausalLM NemotronForCausalLM
    NemotronHForCausalLM NemotronHPuzzleForCausalLM Olmo2ForCausalLM Olmo3ForCausalLM OlmoeForCausalLM
    OlmoForCausalLM OlmoHybridForCausalLM OPTForCausalLM OrionForCausalLM PanguEmbeddedForCausalLM
    PanguProMoEV2ForCausalLM PanguUltraMoEForCausalLM Param2MoEForCausalLM Phi3ForCausalLM PhiForCausalLM
    PhiMoEForCausalLM Plamo3ForCausalLM Qwen2ForCausalLM Qwen2MoeForCausalLM Qwen3_5ForCausalLM
    Qwen3_5MoeForCausalLM Qwen3ForCausalLM Qwen3MoeForCausalLM Qwen3NextForCausalLM Qwen4ExpForCausalLM
    Rnj1ForCausalLM SarvamMLAForCausalLM SarvamMoEForCausalLM SeedOssForCausalLM SmolLM3ForCausalLM SolarForCausalLM
    StableLmForCausalLM Starcoder2ForCausalLM Step1ForCausalLM Step3p5ForCausalLM Step3TextForCausalLM
    TeleChat2ForCausalLM TeleChat3ForCausalLM TeleFLMForCausalLM VaultGemmaForCausalLM
    VibeVoiceAsrForConditionalGeneration Zamba2ForCausalLM
    """
)

#: They answer with text to text, images, sound or video.
MULTIMODAL = _names(
    """
    AriaForConditionalGeneration AudioFlamingo3ForConditionalGeneration BagelForConditionalGeneration
    BailingMoeV3VLForConditionalGeneration BeeForConditionalGeneration Blip2ForConditionalGeneration
    Cohere2VisionForConditionalGeneration CohereCompassForConditionalGeneration Cosmos3EdgeForConditionalGeneration
    Cosmos3ForConditionalGeneration DeepseekOCR2ForCausalLM DeepseekOCRForCausalLM DeepseekV41ForCausalLM
    DeepseekV4ForConditionalGeneration DeepseekVLV2ForCausalLM DiffusionGemmaForBlockDiffusion Dots3NoteForCausalLM
    DotsOCRForCausalLM Eagle2_5_VLForConditionalGeneration Ernie4_5_VLMoeForConditionalGeneration
    Exaone4_5_ForConditionalGeneration FunAudioChatForConditionalGeneration Gemma3ForConditionalGeneration
    Gemma3nForConditionalGeneration Gemma4ForConditionalGeneration Gemma4UnifiedForConditionalGeneration
    GLM4VForCausalLM Glm4vForConditionalGeneration Glm4vMoeForConditionalGeneration Glm5NextForConditionalGeneration
    GlmAsrForConditionalGeneration GlmOcrForConditionalGeneration Granite4VisionForConditionalGeneration
    GraniteSpeechForConditionalGeneration GraniteSpeechPlusForConditionalGeneration H2OVLChatModel HfMoondream
    Idefics3ForConditionalGeneration InternS1ForConditionalGeneration InternS1ProForConditionalGeneration
    InternS2MobiusForConditionalGeneration InternS2PreviewForConditionalGeneration InternVLChatModel
    InternVLForConditionalGeneration IsaacForConditionalGeneration KananaVForConditionalGeneration
    KeyeForConditionalGeneration KeyeVL1_5ForConditionalGeneration KimiK25ForConditionalGeneration
    KimiK3ForConditionalGeneration KimiVLForConditionalGeneration Lfm2VlForConditionalGeneration
    LightOnOCRForConditionalGeneration Llama4ForConditionalGeneration Llama_Nemotron_Nano_VL
    LlavaForConditionalGeneration LlavaNextForConditionalGeneration LlavaNextVideoForConditionalGeneration
    LlavaOnevision2ForConditionalGeneration LlavaOnevisionForConditionalGeneration MiDashengLMModel
    MiMoV2OmniForCausalLM MiniCPMO MiniCPMV MiniCPMV4_6ForConditionalGeneration MiniCPMV4_7ForConditionalGeneration
    MiniMaxM3SparseForConditionalGeneration Mistral3ForConditionalGeneration Molmo2ForConditionalGeneration
    MolmoForCausalLM Moondream3ForCausalLM MoonshotKimiaForCausalLM MossAudioModel
    MuseGlimmerForConditionalGeneration NemotronH_Nano_Omni_Reasoning_V3 NemotronH_Nano_VL_V2
    NemotronH_Omni_Reasoning_V3 NemotronH_Super_Omni_Reasoning_V3 NemotronParseForConditionalGeneration NVLM_D
    OpenCUAForConditionalGeneration OpenPanguVLForConditionalGeneration OpenVLAForActionPrediction Ovis Ovis2_5
    Ovis2_6_MoeForCausalLM Ovis2_6ForCausalLM PaddleOCRVLForConditionalGeneration PaliGemmaForConditionalGeneration
    Phi3VForCausalLM Phi4ForCausalLMV Phi4MMForCausalLM PixtralForConditionalGeneration
    QianfanOCRForConditionalGeneration Qwen2_5_VLForConditionalGeneration Qwen2_5OmniForConditionalGeneration
    Qwen2_5OmniModel Qwen2AudioForConditionalGeneration Qwen2VLForConditionalGeneration
    Qwen3_5ForConditionalGeneration Qwen3_5MoeForConditionalGeneration Qwen3ASRForConditionalGeneration
    Qwen3ASRRealtimeGeneration Qwen3OmniMoeForConditionalGeneration Qwen3VLForConditionalGeneration
    Qwen3VLMoeForConditionalGeneration Qwen4ExpForConditionalGeneration RForConditionalGeneration
    SkyworkR1VChatModel SmolVLMForConditionalGeneration Step3p7ForConditionalGeneration
    Step3VLForConditionalGeneration StepVLForConditionalGeneration UltravoxModel UnlimitedOCRForCausalLM
    VoxtralForConditionalGeneration VoxtralRealtimeGeneration
    """
)

#: They turn speech into text and cannot be asked anything else.
TRANSCRIPTION = _names(
    """
    CohereAsrForConditionalGeneration FireRedASR2ForConditionalGeneration FunASRForConditionalGeneration
    MossTranscribeDiarizeForConditionalGeneration WhisperForConditionalGeneration
    """
)

#: They turn text (some of them images, too) into one vector.
EMBEDDING = _names(
    """
    BertForMaskedLM BertModel BertSpladeSparseEmbeddingModel BgeM3EmbeddingModel CLIPModel
    DeepseekV3BidirectionalModel EmbeddingGemma2Model Gemma2Model Gemma3TextModel GteModel GteNewModel
    JinaEmbeddingsV5Model LlamaBidirectionalModel LlamaModel LlamaNemotronVLModel MistralModel ModernBertModel
    NomicBertModel Qwen2Model RobertaForMaskedLM RobertaModel SiglipModel Terratorch
    VoyageQwen3BidirectionalEmbedModel XLMRobertaModel
    """
)

#: They turn text into a vector for each token (ColBERT, ColPali and the like).
LATE_INTERACTION = _names(
    """
    ColBERTJinaRobertaModel ColBERTLfm2Model ColBERTModernBertModel ColModernVBertForRetrieval ColPaliForRetrieval
    ColQwen3 ColQwen3_5 HF_ColBERT JinaForRanking OpsColQwen3Model Qwen3VLNemotronEmbedModel
    """
)

#: They score a text or a pair of texts.
SEQUENCE_CLASSIFICATION = _names(
    """
    BertForSequenceClassification GPT2ForSequenceClassification GteNewForSequenceClassification
    JambaForSequenceClassification JinaVLForRanking LlamaBidirectionalForSequenceClassification
    LlamaNemotronVLForSequenceClassification ModernBertForSequenceClassification RobertaForSequenceClassification
    XLMRobertaForSequenceClassification
    """
)

#: They label each token.
TOKEN_CLASSIFICATION = _names(
    """
    BertForTokenClassification ClefOmniForJointSchema ModernBertForTokenClassification
    OpenAIPrivacyFilterForTokenClassification Qwen3ASRForcedAlignerForTokenClassification
    RobertaForTokenClassification XLMRobertaForTokenClassification
    """
)

#: They score an answer, or each step of it.
REWARD = _names(
    """
    InternLM2ForRewardModel Qwen2ForProcessRewardModel Qwen2ForRewardModel
    """
)

#: They propose tokens to another model (speculative decoding), and do nothing alone.
DRAFT = _names(
    """
    BailingMoeV25MTPModel BailingMoeV3MTPModel DeepSeekMTPModel DeepseekV32MTPModel DeepSeekV4MTPModel
    DFlash2DraftModel DFlashDraftModel DFlashLagunaForCausalLM DFlashMuseGlimmerAssistantModel Dots3NoteMTPModel
    DSparkDraftModel DSparkV41DraftModel Eagle3DeepseekV2ForCausalLM Eagle3DeepseekV3ForCausalLM
    Eagle3LlamaForCausalLM Eagle3MiniMaxM2ForCausalLM Eagle3Qwen2_5vlForCausalLM Eagle3Qwen3ForCausalLM
    Eagle3Qwen3vlForCausalLM EagleCohereForCausalLM EagleDeepSeekMTPModel EagleLlama4ForCausalLM
    EagleLlamaForCausalLM EagleMiniCPMForCausalLM EagleMistralForCausalLM EagleMistralLarge3ForCausalLM
    ErnieMTPModel Exaone4_5_MTP ExaoneMoeMTP ExtractHiddenStatesModel Gemma4DSparkModel Gemma4MTPModel
    Glm4MoeLiteMTPModel Glm4MoeMTPModel Glm5NextMTPModel GlmOcrMTPModel HYV3MTPModel HYV4MTPModel InklingMTPModel
    InternS2MobiusMTP K3DSparkModel KimiK3MTPModel LiLiCorrDraftModel LlamaForCausalLMEagle3 LongCatFlashMTPModel
    MedusaModel MiMoMTPModel MiMoV2MTPModel MiMoV2OmniMTPModel MiniMaxM3MTP MuseGlimmerAssistantModel
    NemotronHMTPModel OpenPanguMTPModel PEagleDraftModel PeagleLlamaForCausalLM PeagleQwen3ForCausalLM Qwen3_5MoeMTP
    Qwen3_5MTP Qwen3DSparkModel Qwen3NextMTP Qwen3OmniDSparkModel Qwen4ExpMTP Step3p5MTP
    """
)

#: They read text; vLLM wraps transformers' implementation and pools a vector from it.
TEXT_ENCODER = _names(
    """
    AfmoeModel AlbertForMaskedLM AlbertModel ApertusModel ArceeModel AriaTextModel AXK1Model AXK2Model BambaModel
    BertGenerationEncoder BigBirdForMaskedLM BigBirdModel BioGptModel BitNetModel BloomModel CamembertForMaskedLM
    CamembertModel CLIPTextModel CodeGenModel Cohere2Model Cohere2MoeModel CohereCompassTextModel CohereModel
    ConvBertForMaskedLM ConvBertModel CpmAntModel CTRLModel CwmModel Data2VecTextForMaskedLM Data2VecTextModel
    DbrxModel DebertaForMaskedLM DebertaModel DebertaV2ForMaskedLM DebertaV2Model DeepseekV2Model DeepseekV32Model
    DeepseekV3Model DeepseekV4Model DiffLlamaModel DistilBertForMaskedLM DistilBertModel DogeModel Dots1Model
    ElectraForMaskedLM ElectraModel Emu3Model Emu3TextModel Ernie4_5_MoeModel Ernie4_5Model ErnieForMaskedLM
    ErnieModel EuroBertForMaskedLM EuroBertModel Exaone4Model ExaoneMoeModel FalconH1Model FalconMambaModel
    FalconModel FlaubertModel FlexOlmoModel FNetForMaskedLM FNetModel FunnelBaseModel FunnelForMaskedLM FunnelModel
    Gemma3Model Gemma3nModel Gemma3nTextModel Gemma4Model Gemma4TextModel Gemma4UnifiedModel Gemma4UnifiedTextModel
    GemmaModel Glm4Model Glm4MoeLiteModel Glm4MoeModel GlmModel GlmMoeDsaModel GPT2Model GPTBigCodeModel GPTJModel
    GPTNeoModel GPTNeoXJapaneseModel GPTNeoXModel GptOssModel GraniteModel GraniteMoeHybridModel GraniteMoeModel
    GraniteMoeSharedModel GraniteMoeSWAModel GraniteSWAModel GteForMaskedLM HeliumModel HrmTextModel
    HunYuanDenseV1Model HunYuanMoEV1Model HyperCLOVAXModel HYV3Model HYV4Model IBertForMaskedLM IBertModel
    InklingTextModel Jais2Model JambaModel JetMoeModel JinaEmbeddingsV3ForMaskedLM JinaEmbeddingsV3Model
    KimiLinearModel LagunaModel Lfm2Model Lfm2MoeModel Llama4TextModel LongcatFlashModel LongformerForMaskedLM
    LongformerModel LukeForMaskedLM LukeModel Mamba2Model MambaModel MegatronBertForMaskedLM MegatronBertModel
    MellumModel MiMoV2FlashModel MiniCPM3Model MiniMaxM2Model MiniMaxM3VLTextModel MiniMaxModel Ministral3Model
    MinistralModel MixtralModel MllamaTextModel MobileBertForMaskedLM MobileBertModel ModernBertDecoderModel
    ModernBertForMaskedLM MPNetForMaskedLM MPNetModel MptModel MraForMaskedLM MraModel MT5EncoderModel NanoChatModel
    NemotronHModel NemotronModel NeoMMEForMaskedLM NeoMMEModel NomicBertForMaskedLM NystromformerForMaskedLM
    NystromformerModel Olmo2Model Olmo3Model OlmoeModel OlmoHybridModel OlmoModel OpenAIGPTModel OPTModel
    PersimmonModel Phi3Model PhiModel PhimoeModel Qwen2MoeModel Qwen3_5Model Qwen3_5MoeModel Qwen3_5MoeTextModel
    Qwen3_5TextModel Qwen3Model Qwen3MoeModel Qwen3NextModel Qwen4ExpModel Qwen4ExpTextModel RecurrentGemmaModel
    RemBertForMaskedLM RemBertModel RobertaPreLayerNormForMaskedLM RobertaPreLayerNormModel RoCBertForMaskedLM
    RoCBertModel RoFormerForMaskedLM RoFormerModel RwkvModel SeedOssModel SmolLM3Model SolarOpenModel
    SqueezeBertForMaskedLM SqueezeBertModel StableLmModel Starcoder2Model T5EncoderModel T5GemmaEncoderModel
    TapasForMaskedLM TapasModel UMT5EncoderModel VaultGemmaModel XGLMModel XLMModel XLMRobertaForMaskedLM
    XLMRobertaXLForMaskedLM XLMRobertaXLModel XLNetModel xLSTMModel XmodForMaskedLM XmodModel YosoForMaskedLM
    YosoModel YoutuModel Zamba2Model ZambaModel ZayaModel
    """
)

#: They read a whole input and write another text (translation, summaries, speech).
ENCODER_DECODER = _names(
    """
    BartForConditionalGeneration BigBirdPegasusForConditionalGeneration BlenderbotForConditionalGeneration
    BlenderbotSmallForConditionalGeneration CanaryForConditionalGeneration DiaForConditionalGeneration
    EncoderDecoderModel FSMTForConditionalGeneration FunAsrNanoForConditionalGeneration
    KyutaiSpeechToTextForConditionalGeneration LEDForConditionalGeneration LongT5ForConditionalGeneration
    M2M100ForConditionalGeneration MarianMTModel MBartForConditionalGeneration MoonshineForConditionalGeneration
    MoonshineStreamingForConditionalGeneration MT5ForConditionalGeneration MusicFlamingoForConditionalGeneration
    MvpForConditionalGeneration NllbMoeForConditionalGeneration PegasusForConditionalGeneration
    PegasusXForConditionalGeneration PLBartForConditionalGeneration Pop2PianoForConditionalGeneration
    ProphetNetForConditionalGeneration SeamlessM4TForSpeechToText SeamlessM4TForTextToText
    SeamlessM4Tv2ForSpeechToText SeamlessM4Tv2ForTextToText Speech2TextForConditionalGeneration
    SpeechEncoderDecoderModel SpeechT5ForSpeechToText SwitchTransformersForConditionalGeneration
    T5ForConditionalGeneration T5Gemma2ForConditionalGeneration T5GemmaForConditionalGeneration
    UMT5ForConditionalGeneration VibeVoiceForConditionalGeneration VoxtralRealtimeForConditionalGeneration
    """
)
